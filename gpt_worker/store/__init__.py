"""Every query of the service, one named function each, a file a noun; each takes a Session first."""
