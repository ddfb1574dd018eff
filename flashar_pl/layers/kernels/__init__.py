"""Triton kernels of a decoding step: five a layer (`block`), three a step (`heads`); started by `launch`."""
