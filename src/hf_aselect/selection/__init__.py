"""The selection of the timestep: criteria, what they measure, and the record of a selection."""
