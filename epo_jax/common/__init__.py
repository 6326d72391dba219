"""What every room uses: errors for users, files, random keys, stopping."""
