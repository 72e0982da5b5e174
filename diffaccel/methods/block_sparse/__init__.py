"""Block-sparse methods: a selector of key blocks, and a corrector of those left out."""
