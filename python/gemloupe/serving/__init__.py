"""`gemloupe serve`: a model behind the HTTP interfaces of OpenAI and Ollama."""
