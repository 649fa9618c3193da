"""Tools that measure a network: accuracy, accuracy by time step, coding, and what happens inside."""
