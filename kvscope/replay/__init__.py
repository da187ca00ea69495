"""Replays: policies run over the recorded attention of a trace (open loop), scored and written."""
