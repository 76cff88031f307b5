"""`appliance bench`: what an OpenAI-compatible server does with an open-loop workload.

When each request is sent is fixed beforehand and does not depend on any answer, so a server that
falls behind meets a queue and not a polite client. Every request ends as one
`appliance.metrics.outcome.Outcome`, whatever became of it; the figures are those of
`appliance.metrics`, which the simulator uses too.

From the bottom up: `http` (what a response is, as bytes), `sse` (where an event ends), `connection`
(sockets and their pool), `stream` (an answer's tokens and their times), `prompts` and `bodies`
(what is sent), `target` (the server and what it takes), `loop` (the open loop), `judge` (outcomes),
`sweep` (points, resuming), `plots` and `report` (pictures), `progress`, `command` (a person).
"""
