"""Weight files of other implementations: what they say of a Jet, and written from one."""
