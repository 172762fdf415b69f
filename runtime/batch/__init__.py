"""Many pictures or clips from a file of prompts: on an engine room here, or spread by Ray Data (extra ``ray``)."""
