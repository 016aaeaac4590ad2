"""What a model tells of its experts while it is used."""
