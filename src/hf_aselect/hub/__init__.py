"""The road to the Hub: model card and push."""
