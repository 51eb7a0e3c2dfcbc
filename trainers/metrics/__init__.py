"""How good pictures and LoRAs are."""
