"""Length reduction: CTC segments, shrink, looking back, entropy."""
