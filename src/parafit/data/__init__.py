"""How does a user's data become blocks of batches?"""
