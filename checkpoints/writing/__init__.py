"""Files written whole or not at all: model files, folders that appear when they are complete, locks."""
