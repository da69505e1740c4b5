"""After training: the card, the Hub, a merged model, a talk."""
