"""How a Falcon is trained: data, loss, step, state, loop."""
