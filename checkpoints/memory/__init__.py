"""Where read bytes lie: large pages, and files mapped into memory."""
