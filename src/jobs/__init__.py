"""Jobs: what a scientist submits, its states and rules, its store, and the workers that compute."""
