"""How a program of ours speaks to the person at its terminal, and hears them: lines, hidden secrets, signals."""
