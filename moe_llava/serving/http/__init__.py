"""An OpenAI-compatible API over the engine, and the chat page."""
