"""The launches: their states, their records and the steps that move them."""
