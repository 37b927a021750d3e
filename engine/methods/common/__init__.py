"""What methods share: their description, the state that a step works on, a step by a model's own loss, the meta-teacher's step."""
