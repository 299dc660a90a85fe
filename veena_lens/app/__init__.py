"""What people open: HTML reports and the demo."""
