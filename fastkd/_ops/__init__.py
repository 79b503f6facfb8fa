"""What all ops share: their arguments, autograd, fakes and transforms."""
