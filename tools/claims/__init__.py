"""How each verdict of the claims scoreboard is reached."""
