"""Tables, intervals and figures from what was measured."""
