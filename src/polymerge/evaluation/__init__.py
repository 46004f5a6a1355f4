"""What a merge is worth: tasks, scorers, and the bridges to other tools."""
