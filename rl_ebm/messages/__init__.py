"""What is said of a wrong input: checks of arguments, words, numbers in text, and memory."""
