"""POST /v1/responses: OpenAI's newer form of a conversation. Nothing is stored between requests."""
