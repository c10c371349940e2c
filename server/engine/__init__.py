"""The inference engine: model, states, scheduling and sampling."""
