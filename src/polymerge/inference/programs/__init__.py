"""What other programs make of an output: each is a row of the table and a worker that their Python runs."""
