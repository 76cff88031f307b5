"""The HTTP surface: OpenAI routes, admin routes, SSE, errors."""
