"""POST /tokenize and /detokenize: what the served model's tokenizer and chat template do."""

from aiohttp import web

from appliance.api.context import CONTEXT, Context
from appliance.api.decode import BodyDecoder, beside, decode_beside, read_body
from appliance.api.models import json_answer
from appliance.api.prompts import check_ids, encode_prompt, encode_turns
from appliance.api.schemas import DetokenizeBody, TokenizeBody
from appliance.api.turns import turns_of
from appliance.api.validate import check_model, invalid
from appliance.live.records import Encoded

TOKENIZE = web.AppKey("tokenize_decoder", BodyDecoder[TokenizeBody])
SPELLED_BYTES = 16
"""Spelling out one token takes as long as checking so many bytes of a body."""
DETOKENIZE = web.AppKey("detokenize_decoder", BodyDecoder[DetokenizeBody])


async def handle_tokenize(request: web.Request) -> web.Response:
    """Ids of a prompt or of messages."""
    context = request.app[CONTEXT]
    raw = await read_body(request, max_bytes=context.settings.max_body_bytes)
    text = context.node.text
    body = (await decode_beside(text, request.app[TOKENIZE], raw)).body
    check_model(body.model, context.node.info.model)
    ids = list((await _encode(context, body, len(raw))).ids)
    strings = None
    if body.return_token_strs:
        strings = await beside(
            text, SPELLED_BYTES * len(ids), lambda: [text.token_text(token)[0] for token in ids]
        )
    return json_answer(
        {
            "count": len(ids),
            "max_model_len": context.node.info.max_model_len,
            "tokens": ids,
            "token_strs": strings,
        }
    )


async def _encode(context: Context, body: TokenizeBody, num_bytes: int) -> Encoded:
    text, messages = context.node.text, body.messages
    if messages is not None and body.prompt is not None:
        raise invalid("prompt", "and 'messages' are both given; give one of them.")
    if messages is not None:
        return await encode_turns(
            text,
            await beside(text, num_bytes, lambda: turns_of(messages)),
            add_generation_prompt=body.add_generation_prompt is not False,
            template_kwargs=body.chat_template_kwargs,
        )
    if body.prompt is None:
        raise invalid("prompt", "is missing; give it or 'messages'.")
    return await encode_prompt(
        text, body.prompt, add_special_tokens=body.add_special_tokens is not False
    )


async def handle_detokenize(request: web.Request) -> web.Response:
    """The text of token ids, special tokens included."""
    context = request.app[CONTEXT]
    raw = await read_body(request, max_bytes=context.settings.max_body_bytes)
    text, info = context.node.text, context.node.info
    body = (await decode_beside(text, request.app[DETOKENIZE], raw)).body
    check_model(body.model, info.model)
    await beside(text, len(raw), lambda: check_ids(body.tokens, "tokens", info.vocab_size))
    return json_answer({"prompt": await text.decode(body.tokens, skip_special_tokens=False)})
