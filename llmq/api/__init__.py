"""What `import llmq` offers where it is more than a function of one of the rooms: arguments in the
forms that people have, and errors that name them."""
