def predict(run, input, output):
    raise NotImplementedError
