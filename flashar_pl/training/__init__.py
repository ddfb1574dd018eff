"""Lightning modules, schedules, callbacks and strategies."""
