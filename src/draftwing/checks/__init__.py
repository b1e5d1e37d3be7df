"""Exported drafts in the engines that they were written for: the same tokens, and the same drafts accepted."""
