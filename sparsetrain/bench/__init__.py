"""`sparsetrain bench`: what the machine can do, and how layers and nets use it."""
