"""What a Falcon is: config and family, Flax model, sharding, tokenizer, checkpoint formats."""
