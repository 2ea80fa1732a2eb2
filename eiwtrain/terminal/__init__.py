"""What passes between a program and the person at its terminal: lines, hidden secrets, signals."""
