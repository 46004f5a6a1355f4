"""Merge methods: functions on blocks of numbers, and the table of what recipe and plan need to know of them."""
