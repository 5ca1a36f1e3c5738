"""What teachers said of every view, kept in files that anyone can read and nobody can mistake."""
