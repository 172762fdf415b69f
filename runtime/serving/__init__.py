"""Many requests at once on one bundle: the engine room, and the HTTP server over it (extra ``serve``)."""
