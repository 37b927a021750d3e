"""What methods share and what is none: the state that a step works on, training by own outputs, the meta-teacher's steps."""
