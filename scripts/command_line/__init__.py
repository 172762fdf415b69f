"""How commands are told what to do: options from a dataclass, prompts from a file or from the demo's scenes."""
