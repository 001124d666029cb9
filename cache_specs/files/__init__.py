"""Files that others may have made, or be writing: opened and read with care, written whole, locked."""
