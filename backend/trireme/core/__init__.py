"""The values that every room shares. No torch outside `batch`, no server, no process."""
