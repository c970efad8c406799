"""cli: the command `solo`."""
