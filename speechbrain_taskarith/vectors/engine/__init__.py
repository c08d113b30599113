"""How a rule is fed: streamed, in bounded memory."""
