"""GTAPolicy: one tool call a step, its version picked by the user's profile."""
