"""Sequential editing: the editor, its folder and log."""
