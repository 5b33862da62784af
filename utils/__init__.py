"""What every room uses: command line, configuration, processes, precision, logging, files, pictures, downloads."""
